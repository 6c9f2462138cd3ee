"""The Hugging Face `Trainer`, with models from their configuration classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import instrument
from instrument.integrations.transformers import WatchCallback

from ..training import read_back
from .twins import (
    Trained,
    activations,
    assert_gradients,
    assert_same_bits,
    event_files,
    gradient_norms,
    modules_below,
    trained,
)

VOCABULARY, LENGTH, BATCH = 40, 8, 2


def gpt2() -> nn.Module:
    model: nn.Module = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=LENGTH)
    )
    return model


def llama() -> nn.Module:
    model: nn.Module = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCABULARY
        )
    )
    return model


def bert() -> nn.Module:
    model: nn.Module = transformers.BertForMaskedLM(
        transformers.BertConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCABULARY
        )
    )
    return model


class Data(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequences that depend on their index alone."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


class Truth(TrainerCallback):  # type: ignore[misc]  # the trainers have no annotations here
    """Reads what the optimizer is about to use, as the trainer's own documentation says to."""

    def __init__(self) -> None:
        self.norms: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.norms.append(gradient_norms(kwargs["model"]))


def trainer(model: nn.Module, directory: Path, *callbacks: Any, **arguments: Any) -> Any:
    chosen = {
        "max_steps": 5, "per_device_train_batch_size": BATCH, "logging_steps": 1, "learning_rate": 1e-2,
        "report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "max_grad_norm": 0.5,
    } | arguments  # fmt: skip
    return Trainer(
        model,
        TrainingArguments(output_dir=str(directory), **chosen),
        train_dataset=Data(64),
        eval_dataset=Data(4),
        callbacks=list(callbacks),
    )


def fit(
    make: Callable[[], nn.Module],
    directory: Path,
    watch: Callable[[nn.Module], instrument.Watcher] | None = None,
    **arguments: Any,
) -> tuple[Trained, instrument.Watcher | None, Any]:
    transformers.set_seed(0)
    model = make()
    watcher = watch(model) if watch else None
    truth = Truth()
    run = trainer(model, directory, truth, **arguments)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return trained(model, losses, truth.norms), watcher, run


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation and evaluation": {"gradient_accumulation_steps": 3, "eval_strategy": "steps", "eval_steps": 2},
    "checkpointing": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
}
MODELS = {
    "gpt2": (gpt2, "transformer.h.*.mlp", r"transformer\.h\.\d\.mlp", "transformer.h.0.mlp.c_fc", 64),
    "llama": (
        llama,
        "model.layers.*.self_attn",
        r"model\.layers\.\d\.self_attn",
        "model.layers.1.self_attn.q_proj",
        16,
    ),
    "bert": (bert, "**.output.dense", r".*\.output\.dense", "bert.encoder.layer.0.output.dense", 16),
}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("gpt2", "plain"),
        ("gpt2", "reentrant checkpointing"),
        ("gpt2", "accumulation and evaluation"),
        ("llama", "checkpointing"),
        ("llama", "accumulation and evaluation"),
        ("bert", "checkpointing"),
        ("bert", "accumulation and evaluation"),
    ],
)
def test_one_line_in_the_trainer(name: str, case: str, tmp_path: Path) -> None:
    """The trainer's run is the same to the last bit; steps, layers, counts and clipped gradients are the true ones."""
    make, include, pattern, layer, width = MODELS[name]
    plain, _, _ = fit(make, tmp_path, **CASES[case])

    def watch(model: nn.Module) -> instrument.Watcher:
        return instrument.watch(model, include=include, interval=1, strict=True)

    watched, watcher, run = fit(make, tmp_path, watch, **CASES[case])
    assert watcher is not None
    assert_same_bits(watched, plain)
    assert watcher.current_step == run.state.global_step == 5
    assert_gradients(watcher.history, plain, include)
    passes = CASES[case].get("gradient_accumulation_steps", 1)
    for record in watcher.history:
        found = activations(record)
        assert {name.partition("[")[0] for name in found} == modules_below(run.model, pattern)
        assert found[layer] == passes * BATCH * LENGTH * width
    assert watcher.notices == ()
    watcher.close()


def logged(directory: Path) -> tuple[dict[str, list[int]], dict[str, dict[int, float]]]:
    (file,) = event_files(directory)
    return read_back(file.parent)


def test_the_callback_writes_to_the_trainers_tensorboard(tmp_path: Path) -> None:
    """In the trainer's one event file its losses and our tags stand side by side, at the trainer's own steps."""
    plain, _, _ = fit(gpt2, tmp_path / "plain", gradient_accumulation_steps=2, logging_steps=2)
    transformers.set_seed(0)
    model, callback, truth = gpt2(), WatchCallback(include="**.c_fc", interval=2, scalar_interval=1), Truth()
    run = trainer(
        model,
        tmp_path / "ours",
        truth,
        callback,
        report_to="tensorboard",
        gradient_accumulation_steps=2,
        logging_steps=2,
    )
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert_same_bits(trained(model, losses, truth.norms), plain)
    histograms, scalars = logged(tmp_path / "ours")
    assert list(scalars["train/loss"]) == [2, 4]
    assert histograms["Parameters/transformer.h.1.mlp.c_fc.weight"] == [0, 2, 4]
    size = model.get_parameter("transformer.h.1.mlp.c_fc.weight").numel()
    expected = {
        step: pytest.approx(norms["transformer.h.1.mlp.c_fc.weight"] / size**0.5, rel=1e-5)
        for step, norms in enumerate(plain.norms)
    }
    assert scalars["Gradients.rms/transformer.h.1.mlp.c_fc.weight"] == expected
    assert set(scalars["Activations.rms/transformer.h.1.mlp.c_fc"]) == {0, 1, 2, 3, 4}
    assert callback.watcher is not None
    assert callback.watcher.current_step == run.state.global_step == 5
    assert callback.watcher.notices == ()
    assert not (Path.cwd() / "runs").exists()


def test_the_callback_goes_on_where_a_checkpoint_ended(tmp_path: Path) -> None:
    """A resumed training is recorded from the trainer's step on."""
    transformers.set_seed(0)
    trainer(gpt2(), tmp_path, max_steps=3, save_strategy="steps", save_steps=3).train()
    callback = WatchCallback(include="**.c_fc", interval=1, strict=True)
    run = trainer(gpt2(), tmp_path, callback, max_steps=5)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert callback.watcher is not None
    assert [record.step for record in callback.watcher.history] == [3, 4]
    assert callback.watcher.current_step == run.state.global_step == 5


def test_the_callback_logs_the_last_step_of_a_training_that_ends_early(tmp_path: Path) -> None:
    """Where the end is decided on after the last epoch, the trainer's closed writer gets the last step all the same."""
    transformers.set_seed(0)
    callback = WatchCallback(include="**.c_fc", interval=50)
    run = trainer(
        gpt2(), tmp_path, callback, EarlyStoppingCallback(1, early_stopping_threshold=100.0),
        report_to="tensorboard", max_steps=-1, num_train_epochs=9, per_device_train_batch_size=16,
        eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    run.train()
    assert 1 < run.state.global_step < 36
    histograms, _ = read_back(event_files(tmp_path)[0].parent)
    assert histograms["Parameters/transformer.h.1.mlp.c_fc.weight"] == [0, run.state.global_step - 1]


def test_the_callback_has_a_run_of_its_own_where_the_trainer_has_no_tensorboard(tmp_path: Path) -> None:
    """Without a logger, and with ``logdir``, the run is ours; one callback serves trainings one after the other."""
    callback = WatchCallback(include="**.c_fc", interval=2)
    for expected in ("001", "002"):
        trainer(gpt2(), tmp_path, callback, max_steps=2).train()
        assert callback.watcher is not None
        assert callback.watcher.logdir is not None
        assert Path(callback.watcher.logdir).parents[1].name.endswith(expected)
    chosen = WatchCallback(include="**.c_fc", logdir=tmp_path / "chosen")
    trainer(gpt2(), tmp_path, chosen, max_steps=2, report_to="tensorboard").train()
    assert len(event_files(tmp_path / "chosen")) == 1


def test_the_callback_refuses_at_once_and_fails_quietly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong keywords are refused when it is made; a fault of ours later does not end the training."""
    with pytest.raises(instrument.ConfigError, match="unknown keyword 'inteval'; did you mean 'interval'"):
        WatchCallback(inteval=10)
    with pytest.raises(instrument.ConfigError, match="interval: found 'x'"):
        WatchCallback(interval="x")
    with pytest.raises(instrument.ConfigError, match="'gradient'"):
        WatchCallback(kinds="gradient")
    with pytest.raises(instrument.SelectionError, match="include='nothing' matches no name"):
        trainer(gpt2(), tmp_path, WatchCallback(include="nothing")).train()

    def fail(*_: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(instrument.Watcher, "step", fail)
    run = trainer(gpt2(), tmp_path, WatchCallback(include="**.c_fc"), max_steps=2)
    with pytest.warns(instrument.InstrumentWarning, match="failed with RuntimeError: ours; training goes on"):
        run.train()
    assert run.state.global_step == 2
