"""flowexport: Flowformer models from PyTorch to phones, browsers and edge GPUs.

Importing this package imports no heavy dependency; the stages live in
:mod:`flowexport.pipeline`.
"""

__version__ = "0.1.0"
