"""GLM-Image, quantised: the public names.

They are resolved on first use, so that `import qruntime` costs milliseconds and needs no torch: a program may import it
at start and never draw a picture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pipeline import GlmImagePipeline
    from .request import GenerateRequest

__all__ = ["GenerateRequest", "GlmImagePipeline", "__version__"]
__version__ = "0.1.0"  # the only copy: pyproject.toml reads it from here, as text


def __getattr__(name: str) -> object:
    if name == "GlmImagePipeline":
        from .pipeline import GlmImagePipeline

        return GlmImagePipeline
    if name == "GenerateRequest":
        from .request import GenerateRequest

        return GenerateRequest
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
