"""Data sets: real samples as tensors, in fixed splits. Knows no model and no trainer.

What cannot be found or read is a `DataError` that names the setting and every address tried; nothing is made up.
"""

from esper.data.load import load_data
from esper.data.sets import DataSets

__all__ = ["DataSets", "load_data"]
