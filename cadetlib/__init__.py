"""CADet: fully self-supervised anomaly detection with contrastive learning (NeurIPS 2023), reproduced.

Each module is one idea; `cadetlib.cadet.CADet` is the detector, `cadetlib.mmd` the two-sample tests.
"""

__version__ = "0.3.0"
