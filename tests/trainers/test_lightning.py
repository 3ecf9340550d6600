"""oplora.AdamW in Lightning's Trainer, by automatic and by manual optimisation. Skipped where lightning is missing: its
pins are its own, so `pip install lightning` is for an environment of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Net, assert_same_bits, factors, make_model
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import oplora

lightning = pytest.importorskip("lightning")
STEPS = 20


class Adapted(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, manual: bool) -> None:
        super().__init__()
        self.model, self.automatic_optimization = make_model(), not manual
        self.losses: list[float] = []

    def configure_optimizers(self) -> Any:
        return oplora.AdamW(self.model)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        loss = (self.model(x) - y).square().mean()
        self.losses.append(loss.item())
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss


def fit(manual: bool, folder: Path, **options: Any) -> Adapted:
    random = torch.Generator().manual_seed(7)
    x, y = (torch.randn(16, size, generator=random) for size in (13, 5))
    module = Adapted(manual)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = lightning.Trainer(max_epochs=STEPS, accelerator="cpu", default_root_dir=folder, **quiet)
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=16), **options)
    module.checkpoint = str(folder / "last.ckpt")
    trainer.save_checkpoint(module.checkpoint)
    return module


def test_automatic_and_manual_optimisation_train_alike(tmp_path: Path) -> None:
    automatic, manual = (fit(manual, tmp_path / str(manual)) for manual in (False, True))
    assert automatic.losses == manual.losses
    assert automatic.losses[-1] < 0.9 * automatic.losses[0]
    assert_same_bits(factors(automatic.model), factors(manual.model))


def test_peft_reads_what_lightning_trained(tmp_path: Path) -> None:
    model = fit(False, tmp_path).model
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(0)
    read = PeftModel.from_pretrained(Net(), tmp_path / "adapter")
    x = torch.randn(3, 13)
    assert torch.equal(read(x), model(x))


def test_checkpoint_of_lightning_has_the_optimizer(tmp_path: Path) -> None:
    trained = fit(False, tmp_path / "one")
    saved = torch.load(trained.checkpoint, weights_only=True)["optimizer_states"][0]
    resumed = oplora.AdamW(make_model())
    resumed.load_state_dict(saved)
    assert resumed.found_lr > 0
