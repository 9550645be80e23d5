"""Pretraining with something changed."""

import pytest

from cadetlib import encoders, parameters, recipes, record, training_settings

GIVEN = parameters.read_yaml(record.checkout() / "params" / "digits" / "01_pretraining.yaml")


def test_changes_are_of_value_and_type_and_of_known_names():
    assert recipes.changed(GIVEN, "blur: 0.0")["blur"] == 0.0
    for wrong in ("", "blur", "blur:", "blurr: 0.0", "blur: [", "blur=0.0"):
        with pytest.raises(ValueError, match="recipe: found"):
            recipes.changed(GIVEN, wrong)
    with pytest.raises(ValueError, match="width"):
        recipes.obtain(GIVEN, ["width: wide"], train=False)


@pytest.mark.slow
def test_a_recipe_is_trained_with_its_changes_or_left_out(tmp_path):
    given = GIVEN | dict(output=str(tmp_path), width=4, epochs=1, warmup_epochs=0, knn_every=0)
    recipe = "width: 2, blur: 0.0"
    assert recipes.obtain(given, [recipe], train=False) == ({}, [recipe])
    files, left_out = recipes.obtain(given, [recipe], train=True)
    assert encoders.load_encoder(files[recipe]).config["width"] == 2 and not left_out
    assert recipes.obtain(given, [recipe], train=False)[0] == files
    assert files[recipe].parent != training_settings.run_folder(
        training_settings.settings_from(given)
    )  # and leaves the profile's own run alone
