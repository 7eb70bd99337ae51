"""Tables, pictures and submissions from the records of runs."""

from typing import TYPE_CHECKING

from lora_nlu.lazy import lazy_names

if TYPE_CHECKING:
    from lora_nlu.report.tables import write_report as write_report

__getattr__, __all__ = lazy_names(__name__, __file__)
