"""`megatron-dmc report`: what a retrofit reached, as data (JSON), plots and one HTML page."""

from megatron_dmc.quality.report.data import (
    Completion,
    CurvePoint,
    ReportData,
    Sample,
    ValidationPoint,
)

__all__ = ["Completion", "CurvePoint", "ReportData", "Sample", "ValidationPoint"]
