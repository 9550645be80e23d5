"""Keep what a profile's run gave, small enough for git: results, figures and the report; or its encoder, as float16.

    python -m cadetlib.keep PROFILE [--encoder]        from outputs/PROFILE to outputs/reference/PROFILE

An encoder that is kept is what notebook 01 offers to those who have not trained one. Its float16 weights are not quite the
trained ones, so: keep the encoder first, run the notebooks with it, then keep their results.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from pathlib import Path

from cadetlib import encoders, record, report

LINKS = "The links lead to the notebooks as they are in the project; the executed ones were not kept."
LARGEST = {".safetensors": 8 * 2**20, ".html": 3 * 2**20}  # bytes
LARGEST_ELSE = 2**20


def keep_encoder(run: Path, kept: Path) -> Path:
    """The encoder of a finished training run, as float16, with its log -> its file in the folder `kept`.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     run, kept = Path(folder, "run"), Path(folder, "kept")
    ...     path = encoders.save_encoder(encoders.ResNet("resnet10", width=4, stem="cifar"), run / "encoder.safetensors")
    ...     _ = record.write_atomically(run / "log.jsonl", "")
    ...     keep_encoder(run, kept).stat().st_size < path.stat().st_size
    True
    """
    tensors, about = encoders.read_safetensors(run / "encoder.safetensors", encoders.FORMAT)
    about.pop("format")
    file = encoders.write_safetensors(kept / "encoder.safetensors", encoders.halved(tensors), encoders.FORMAT, **about)
    shutil.copy(run / "log.jsonl", kept / "log.jsonl")
    return file


def keep_results(folder: Path, kept: Path) -> list[Path]:
    """The results, PNG figures and report of a results folder, each verified or complete -> their files in the folder `kept`.

    ValueError, before any is copied, for results that are damaged, of a dry run, or made from others than those beside them.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = record.write_atomically(f"{folder}/run/report.html", "<p>all of it</p>")
    ...     [file.name for file in keep_results(Path(folder, "run"), Path(folder, "kept"))]
    ['report.html']
    """
    sources = [*sorted(folder.glob("[0-9][0-9]_*.json")), *sorted((folder / "figures").glob("*.png")), folder / "report.html"]
    found = {source.stem: record.result(source) for source in sources if source.suffix == ".json"}
    for name, loaded in found.items():
        for needed, digest in loaded.provenance.get("needed", {}).items():
            if needed in found and found[needed].digest != digest:
                raise ValueError(
                    f"{name}: found results made from another run of {needed}, expected the one beside it; run it again"
                )
    made = []
    for source in sources:
        target = kept / source.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        made.append(Path(shutil.copy(source, target)))
        if source.suffix == ".html":
            link_to_sources(target)
    return made


def link_to_sources(page: Path) -> None:
    """Executed notebooks are not kept: a report that linked to those beside it links to the notebooks themselves, and says so.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     page = record.write_atomically(f"{folder}/report.html", f'<a href="00_setup.ipynb"></a> {report.LINKS}')
    ...     link_to_sources(page)
    ...     _, target, said = page.read_text().split('"')
    ...     Path(folder, target).resolve() == record.checkout() / "notebooks" / "00_setup.ipynb", "not kept" in said
    (True, True)
    """
    notebooks = os.path.relpath(record.checkout() / "notebooks", page.parent)
    text = re.sub(r'href="(\d\d_\w+\.ipynb)"', rf'href="{notebooks}/\1"', page.read_text(encoding="utf-8"))
    record.write_atomically(page, text.replace(report.LINKS, LINKS))


def too_large(files: list[Path]) -> list[str]:
    """What git should not hold, with its size.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     too_large([record.write_atomically(f"{folder}/figure.png", bytes(3 * 2**20))])
    ['figure.png: 3.0 MiB']
    """
    sizes = [(file, file.stat().st_size) for file in files]
    return [f"{file.name}: {size / 2**20:.1f} MiB" for file, size in sizes if size > LARGEST.get(file.suffix, LARGEST_ELSE)]


def main(arguments: list[str] | None = None) -> int:
    """The command line of this module; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m cadetlib.keep", description="Keep what a profile's run gave.")
    parser.add_argument("profile")
    parser.add_argument("--encoder", action="store_true", help="keep the contrastive encoder, and leave the results as they are")
    chosen = parser.parse_args(arguments)
    folder, kept = record.output_folder(chosen.profile), record.checkout() / "outputs" / "reference" / chosen.profile
    try:
        if chosen.encoder:
            trained = record.result(folder / "01_pretraining.json").results["encoders"]["contrastive"]
            files = [keep_encoder((folder / trained).parent, kept / "pretraining" / "contrastive")]
        else:
            files = keep_results(folder, kept)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name in too_large(files):
        print(f"too large for git: {name}", file=sys.stderr)
    print(f"kept {len(files)} files in {kept}")
    return 1 if too_large(files) else 0


if __name__ == "__main__":
    sys.exit(main())
