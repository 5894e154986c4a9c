"""The formats that can be read and written, and the rules that map each of them to our arrays."""

from collections.abc import Mapping
from typing import Any

from big_vit.interop import detectors, google, huggingface, openclip, timm_vit
from big_vit.interop.layout import Rule, Shapes

READ = (
    *(*google.FORMATS, *timm_vit.FORMATS, *huggingface.FORMATS, *openclip.FORMATS),
    *detectors.FORMATS,
)
# MAE, DeiT-III and DINOv2 released pickled files; timm reads the same names as safetensors.
WRITE = (
    *(*google.FORMATS, 'timm', *huggingface.FORMATS, *openclip.FORMATS),
    *detectors.FORMATS,
)


def rules_of(
    format: str, settings: Mapping[str, Any], shapes: Shapes, file_layout: Mapping[str, Any]
) -> list[Rule]:
    """Return the rules of a format for our parameters of these shapes."""
    if format in google.FORMATS:
        return google.rules_of(shapes, file_layout)
    if format in timm_vit.FORMATS:
        return timm_vit.rules_of(format, settings, shapes, file_layout)
    if format in openclip.FORMATS:
        return openclip.rules_of(settings, shapes, file_layout)
    if format in detectors.FORMATS:
        return detectors.rules_of(format, settings, shapes, file_layout)
    return huggingface.rules_of(format, settings, shapes, file_layout)
