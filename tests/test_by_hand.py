"""`TensorBoardLogger`: the functions of the original document."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

import instrument
from instrument import TensorBoardLogger

from .training import mlp, read_back, train


def test_the_loop_of_the_original_document(tmp_path: Path) -> None:
    """Parameters, gradients and activations are written under the original tags at the steps given."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logger = TensorBoardLogger(tmp_path / "run", config={"histogram_interval": 2})
    interval = instrument.get_histogram_interval({"histogram_interval": 2})
    for step in range(5):
        train(model, optimizer, 1, first=step)
        if step % interval == 0:
            logger.log_model_histograms(model, step)
            logger.log_activation_histograms({"layer1_output": torch.randn(8, 3)}, step)
    logger.close()
    logger.close()
    histograms, scalars = read_back(tmp_path / "run")
    names = ["0.weight", "0.bias", "3.weight", "3.bias"]
    expected = {
        f"{section}/{name}": [0, 2, 4] for section in ("Parameters", "Gradients", "Gradients.log10") for name in names
    }
    assert histograms == {**expected, "Activations/layer1_output": [0, 2, 4]}
    assert scalars == {}


def test_what_has_no_gradient_is_left_out(tmp_path: Path) -> None:
    """A frozen layer has its values logged and no gradient, never zeros."""
    model = mlp()
    model[0].requires_grad_(False)
    train(model, torch.optim.SGD(model[3].parameters(), lr=0.1), 1)
    with TensorBoardLogger(tmp_path) as logger:
        logger.log_model_histograms(model, 0)
    assert "Gradients/0.weight" not in read_back(tmp_path)[0]
    assert "Parameters/0.weight" in read_back(tmp_path)[0]


@pytest.mark.parametrize("interval", [0, -3])
def test_an_interval_of_zero_or_below_switches_it_off(interval: int, tmp_path: Path) -> None:
    """With an interval of 0 or below the logger makes no file and does nothing."""
    logger = TensorBoardLogger(config={"histogram_interval": interval})
    logger.log_model_histograms(mlp(), 0)
    logger.log_activation_histograms({"a": torch.ones(1)}, 0)
    logger.close()
    assert logger.writer is None
    assert list(tmp_path.iterdir()) == []


def test_a_users_writer_stays_open(tmp_path: Path) -> None:
    """A writer that is given is written through and left open."""
    writer = SummaryWriter(str(tmp_path))
    with TensorBoardLogger(writer) as logger:
        logger.log_activation_histograms({"a": torch.ones(3)}, 7)
    writer.add_scalar("after", 1.0, 0)
    writer.close()
    assert read_back(tmp_path)[0] == {"Activations/a": [7]}
    assert len(list(tmp_path.iterdir())) == 1


def test_without_a_directory_a_run_is_made(tmp_path: Path) -> None:
    """Without an argument the logger makes a run directory under the configured one."""
    logger = TensorBoardLogger(config={"runs_directory": "mine"})
    logger.close()
    assert [path.parts[-3] for path in tmp_path.glob("mine/*_001/logs/tensorboard")] != []


def test_what_cannot_be_measured_is_a_warning(tmp_path: Path) -> None:
    """A meta tensor among activations is warned of, and the others are logged."""
    with TensorBoardLogger(tmp_path) as logger, pytest.warns(instrument.InstrumentWarning, match="a are not measured"):
        logger.log_activation_histograms({"a": torch.ones(1, device="meta"), "b": torch.ones(1)}, 0)
    assert read_back(tmp_path)[0] == {"Activations/b": [0]}


def test_a_directory_that_cannot_be_made_is_a_warning(tmp_path: Path) -> None:
    """A logger that cannot make its directory warns once and does nothing."""
    (tmp_path / "file").write_text("x")
    with pytest.warns(instrument.InstrumentWarning, match="nothing is logged, training goes on"):
        logger = TensorBoardLogger(tmp_path / "file" / "run")
    logger.log_model_histograms(mlp(), 0)
    logger.close()
