"""PEFT's own format, written by PEFT and moved into place when it is whole."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import OPLoRAFileError, OPLoRARuntimeError, OPLoRATypeError

__all__ = ["save"]


def save(model: Any, path: Path) -> None:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model, PeftModel):
        raise OPLoRATypeError(
            f"oplora.save_adapter: expected a PeftModel, got {type(model).__name__}. A model with an injected adapter "
            "saves it by its own save_pretrained (transformers) or save_lora_adapter (diffusers)."
        )
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise OPLoRARuntimeError(
                f"oplora.save_adapter: layer {name} is merged into its base. Call model.unmerge_adapter() first."
            )
    try:
        path.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".oplora-", dir=path))
    except OSError as error:
        raise OPLoRAFileError(f"oplora.save_adapter: cannot write into {path}: {error}.") from error
    try:
        model.save_pretrained(str(beside))
        for file in sorted(p for p in beside.rglob("*") if p.is_file()):
            target = path / file.relative_to(beside)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    except (OSError, SafetensorError) as error:  # safetensors reports failed writes as errors of its own
        raise OPLoRAFileError(
            f"oplora.save_adapter: writing the adapter into {path} failed ({error}). Free some space or choose another "
            "folder; the adapter is still in the model."
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
