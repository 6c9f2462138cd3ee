"""`instrument run`: scripts that know nothing of this library, in processes of their own, beside their plain twins."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import instrument
from instrument.run import Script, _models_that_hold

from .training import mlp, read_back

LOOP = """
import sys, torch
torch.manual_seed(0)

class Net(torch.nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.body = torch.nn.Linear(4, width)
        self.head = torch.nn.Linear(width, 1)

    def forward(self, x):
        return self.head(self.body(x).relu())

def train(model, optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        print("step", step, loss.item().hex(), model.head.weight.grad.square().mean().sqrt().item())
        optimizer.step()
"""


def write(directory: Path, text: str, name: str = "script.py") -> Path:
    path = directory / name
    path.write_text(textwrap.dedent(text))
    return path


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # several processes run beside each other
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=one_thread, capture_output=True, text=True, timeout=120
    )


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return python("-m", "instrument", "run", *arguments, cwd=cwd)


def twins(
    *arguments: str, cwd: Path, options: tuple[str, ...] = ()
) -> tuple[subprocess.CompletedProcess[str], subprocess.CompletedProcess[str]]:
    """The same command without and with us, side by side."""
    with ThreadPoolExecutor() as pool:
        plain = pool.submit(python, *arguments, cwd=cwd)
        ours = run(*options, *arguments, cwd=cwd)
        return plain.result(), ours


def runs_in(directory: Path) -> dict[str, dict[str, list[int]]]:
    """Name of each run to its tags and their steps."""
    found = sorted(path for path in (directory / "runs").rglob("tensorboard") if path.is_dir())
    return {
        str(path.parents[1].relative_to(directory / "runs")).partition("_")[2]: read_back(path)[0] for path in found
    }


def test_a_script_runs_as_it_does_without_us(tmp_path: Path) -> None:
    """Same output to the last bit, same `sys.argv`, `sys.path`, globals and files; its options stay its own."""
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere", "answer = 42", "beside.py")
    write(
        tmp_path / "elsewhere",
        """
        print(__name__, __file__, __doc__, __package__, __spec__, sorted(globals()))
        import sys
        print(sys.argv, sys.path, sys.excepthook is sys.__excepthook__)
        import beside, inspect, multiprocessing, pickle
        """
        + textwrap.indent(LOOP, " " * 8)
        + """
        print(beside.answer, pickle.loads(pickle.dumps(Net)) is Net, inspect.getsource(Net)[:10])
        def double(x):
            return 2 * x
        if __name__ == "__main__":
            model = Net()
            train(model, torch.optim.Adam(model.parameters()), 5)
            print([p.sum().item().hex() for p in model.parameters()], torch.get_rng_state().sum().item())
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.map(double, [1, 2]))
        """,
    )
    (tmp_path / "link.py").symlink_to(tmp_path / "elsewhere" / "script.py")
    arguments = ["link.py", "--interval", "7", "-m", "--", "--include", "x", "--help"]
    plain, ours = twins(*arguments, cwd=tmp_path, options=("--interval", "2"))
    assert (plain.returncode, plain.stderr) == (0, "")
    assert ours.stdout == plain.stdout
    assert ours.returncode == 0
    (line,) = ours.stderr.splitlines()
    assert line.startswith("instrument: watched Net (5 steps); the run is runs/")
    (tags,) = runs_in(tmp_path).values()
    assert tags["Activations/head"] == tags["Activations/Net"] == tags["Gradients/head.weight"] == [0, 2, 4]
    gradients = [float(text.split()[-1]) for text in plain.stdout.splitlines() if text.startswith("step")]
    (logdir,) = (tmp_path / "runs").rglob("tensorboard")
    recorded = read_back(logdir)[1]["Gradients.rms/head.weight"]
    assert recorded == {step: pytest.approx(gradients[step], rel=1e-5) for step in (0, 2, 4)}


ENDS = {
    "code": "import atexit\natexit.register(print, 'last words')\nsys.exit(3)",
    "exception": "import instrument\ndef fail():\n    raise instrument.ConfigError('mine')\nfail()",
    "interrupt": "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)",
    "hook": "sys.excepthook = lambda kind, error, trace: print(kind, trace.tb_frame.f_code.co_name)\n1 / 0",
}


@pytest.mark.parametrize("how", ENDS)
def test_a_script_ends_as_it_does_without_us(how: str, tmp_path: Path) -> None:
    """Exit code, signal, message and traceback are the script's; the run is closed and named all the same."""
    write(tmp_path, LOOP + "model = Net()\ntrain(model, torch.optim.SGD(model.parameters(), 0.1), 2)\n" + ENDS[how])
    plain, ours = twins("script.py", cwd=tmp_path)
    assert (ours.returncode, ours.stdout) == (plain.returncode, plain.stdout)
    *lines, last = ours.stderr.splitlines()
    assert lines == plain.stderr.splitlines()
    assert last.startswith("instrument: watched Net (2 steps); the run is runs/")
    (tags,) = runs_in(tmp_path).values()
    assert tags["Parameters/head.weight"] == [0, 1]
    if how == "interrupt":
        assert ours.returncode == -signal.SIGINT


def test_a_script_that_python_cannot_read_is_told_as_python_tells_it(tmp_path: Path) -> None:
    """A syntax error is shown without any frame of ours."""
    write(tmp_path, "x = (\n")
    plain, ours = twins("script.py", cwd=tmp_path)
    assert ours.returncode == plain.returncode == 1
    assert ours.stderr.splitlines()[:-1] == plain.stderr.splitlines()


def test_several_models_have_runs_of_their_own(tmp_path: Path) -> None:
    """Networks that are trained beside each other: a run each, by the name of the class, in one run directory."""
    write(
        tmp_path,
        LOOP
        + """
class Critic(Net):
    pass

net, critic, twin = Net(), Critic(), Net()
optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (net, critic, twin)]
for model, optimizer, steps in zip((net, critic, twin), optimizers, (2, 3, 1)):
    train(model, optimizer, steps)
""",
    )
    ours = run("--interval", "1", "--include", "head", "script.py", cwd=tmp_path)
    (line,) = ours.stderr.splitlines()
    assert line.startswith(
        "instrument: watched 3 models: Net (2 steps), Critic (3 steps), Net_2 (1 steps); the run is "
    )
    found = runs_in(tmp_path)
    assert {name: tags["Activations/head"] for name, tags in found.items()} == {
        "001/Critic": [0, 1, 2], "001/Net": [0, 1], "001/Net_2": [0],
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {line[-14:]}


def test_a_model_that_comes_later_leaves_the_first_run_alone(tmp_path: Path) -> None:
    """What was recorded before a second model came stays where it is; copies and frozen parts are found."""
    write(
        tmp_path,
        LOOP
        + """
import copy

class Whole(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.requires_grad_(False)
        self.net.head.requires_grad_(True)

    def forward(self, x):
        return self.net(x)

first = Net()
train(first, torch.optim.SGD(first.parameters(), 0.1), 2)
train(first, torch.optim.Adam(first.parameters()), 1)
whole = Whole(copy.deepcopy(first))
train_head = torch.optim.SGD(whole.net.head.parameters(), 0.1)
whole(torch.ones(1, 4)).backward()
train_head.step()
image = torch.zeros(3, requires_grad=True)
torch.optim.LBFGS([image])
""",
    )
    ours = run("--interval", "1", "--exclude", "**.bias", "script.py", cwd=tmp_path)
    (line,) = ours.stderr.splitlines()
    assert line.startswith("instrument: watched 2 models: Net (3 steps), Whole (1 steps); the run is ")
    found = runs_in(tmp_path)
    assert {name: tags["Gradients/" + head] for (name, tags), head in zip(
        found.items(), ("net.head.weight", "head.weight"), strict=True
    )} == {"001/Whole": [0], "001": [0, 1, 2]}  # fmt: skip
    assert found["001/Whole"]["Activations/Whole"] == [0]
    assert not any(tag.endswith("bias") for tags in found.values() for tag in tags)


def test_a_model_that_the_script_watches_itself_is_left_to_it(tmp_path: Path) -> None:
    """No second watch, no warning and no line of ours where a script has its own."""
    write(
        tmp_path,
        LOOP
        + """
import instrument
model = Net()
watcher = instrument.watch(model, logdir="mine")
train(model, torch.optim.SGD(model.parameters(), 0.1), 2)
print(watcher)
""",
    )
    ours = run("script.py", cwd=tmp_path)
    assert (ours.returncode, ours.stderr) == (0, "")
    assert "Watcher(step 2" in ours.stdout
    assert not (tmp_path / "runs").exists()


def test_threads_that_still_train_are_waited_for(tmp_path: Path) -> None:
    """Steps that a thread makes after the last line of the script are recorded."""
    write(
        tmp_path,
        LOOP
        + """
import threading, time
model = Net()
optimizer = torch.optim.SGD(model.parameters(), 0.1)
threading.Thread(target=lambda: (time.sleep(0.5), train(model, optimizer, 3))).start()
""",
    )
    ours = run("--interval", "1", "script.py", cwd=tmp_path)
    assert ours.stderr.startswith("instrument: watched Net (3 steps)")
    assert runs_in(tmp_path)["001"]["Activations/head"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "text", "line"),
    [
        ([], "print(1)", "no model was found: no optimizer was made for the parameters of a torch.nn.Module"),
        (["--interval", "0"], "print(1)", "nothing was watched: the interval is 0"),
        (
            ["--include", "boddy"],
            LOOP + "m = Net()\ntrain(m, torch.optim.SGD(m.parameters(), 0.1), 1)",
            "Net is not watched: include='boddy' matches no name; nearest: 'body', 'body.bias', 'body.weight'",
        ),
    ],
)
def test_nothing_to_watch_is_one_line(options: list[str], text: str, line: str, tmp_path: Path) -> None:
    """Without a model, an interval or a match the script runs to its end, and one line says why there is no run."""
    write(tmp_path, text)
    ours = run(*options, "script.py", cwd=tmp_path)
    assert (ours.returncode, ours.stderr) == (0, f"instrument: {line}\n")
    assert ours.stdout
    assert not (tmp_path / "runs").exists()


def test_mistakes_are_told_before_the_script_begins(tmp_path: Path) -> None:
    """A script that is not there, a pattern that cannot be read, a wrong configuration: one line and exit code 1."""
    write(tmp_path, "print('begun')")
    (tmp_path / "configs").mkdir()
    with pytest.raises(instrument.RunError, match=r"^script configs cannot be read: Is a directory$"):
        Script("configs")
    with pytest.raises(instrument.SelectionError, match=r"re:\("):
        Script("script.py", include=["re:("])
    missing = run("nope.py", "--interval", "x", cwd=tmp_path)
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr == "instrument: there is no script nope.py\n"
    missing = run("-m", "nope.nothing", cwd=tmp_path)
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr.startswith("instrument: there is no module nope.nothing that can be run\n")
    write(tmp_path / "configs", '{"histogram_intervall": 3}', "tensorboard.json")
    wrong = run("script.py", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (1, "", 1)
    assert "did you mean 'histogram_interval'?" in wrong.stderr
    assert run("--intervall", "3", "script.py", cwd=tmp_path).returncode == 2


def test_modules_run_as_with_python_m(tmp_path: Path) -> None:
    """``-m`` runs a module of a package, and the ``__main__`` of one, with what they import beside them."""
    (tmp_path / "package").mkdir()
    write(tmp_path / "package", "", "__init__.py")
    write(tmp_path / "package", "print('main', __name__, __package__)", "__main__.py")
    write(
        tmp_path / "package",
        "print(__name__, __package__, __spec__.name, __file__)\n"
        + LOOP
        + "print(sys.argv, sys.path)\nmodel = Net()\ntrain(model, torch.optim.SGD(model.parameters(), 0.1), 2)",
        "train.py",
    )
    for arguments in (["-m", "package.train", "--interval", "9"], ["-m", "package"]):
        plain, ours = twins(*arguments, cwd=tmp_path)
        assert (plain.returncode, plain.stderr) == (0, "")
        assert (ours.returncode, ours.stdout) == (0, plain.stdout)
    assert runs_in(tmp_path)["001"]["Parameters/head.weight"] == [0, 1]


def test_the_model_is_the_outermost_module_around_the_parameters() -> None:
    """Of modules around some parameters the outermost is the model; of several, the smallest; as few as are needed."""
    inner, other = mlp(), nn.Linear(4, 4)
    outer = nn.Sequential(inner, nn.ReLU())
    loss = nn.ModuleDict({"model": inner, "teacher": nn.Sequential(*(nn.Linear(9, 9) for _ in range(20)))})
    copied = copy.deepcopy(outer)
    assert _models_that_hold({id(inner[0].weight)}) == [outer]
    assert _models_that_hold({id(inner[0].weight), id(other.bias)}) == [other, outer]
    assert _models_that_hold({id(p) for p in copied.parameters()}) == [copied]
    assert _models_that_hold({id(torch.nn.Parameter())}) == []
    circle = nn.Linear(2, 2)
    circle.child = nn.ReLU()
    circle.child.parent = circle
    assert _models_that_hold({id(circle.weight)}) == [circle]
    del loss
