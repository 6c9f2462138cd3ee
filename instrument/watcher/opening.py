"""The writer of a new watch, and the group of ranks that open one together."""

from __future__ import annotations

from pathlib import Path

from instrument.config import Config
from instrument.errors import ConfigError
from instrument.record.ranks.group import Position, RankGroup
from instrument.record.runs import make_run_directory
from instrument.record.writer import SummaryWriter

__all__ = ["form_group", "make_writer"]

RANK_TAG = "rank"


def make_writer(config: Config, directory: str | None, first_step: int, place: Position) -> SummaryWriter:
    """A writer of our own on a directory.

    Args:
        config: The settings.
        directory: Where to write; without it, in a new run.
        first_step: Step from which on earlier points in the directory are void.
        place: Where this process stands; where every rank writes, each has a directory and names its rank.

    Returns:
        The writer.

    Raises:
        OSError: The directory cannot be made.
        RunError: No run directory can be made.
    """
    if config.ranks != "each" or place.world == 1:
        return SummaryWriter(directory or str(make_run_directory(config.runs_directory)), purge_step=first_step)
    if directory is None:
        directory = str(make_run_directory(config.runs_directory))
    else:
        directory = str(Path(directory) / f"rank{place.rank}")
    writer = SummaryWriter(directory, purge_step=first_step, filename_suffix=f".rank{place.rank}")
    writer.add_text(RANK_TAG, f"rank {place.rank} of {place.world}", first_step)
    return writer


def form_group(config: Config, place: Position) -> RankGroup | None:
    """Meet the ranks to merge with; None where records are not merged.

    Args:
        config: The settings, which must be alike on all ranks.
        place: Where this process stands.

    Returns:
        The group.

    Raises:
        ConfigError: The ranks cannot merge, or have other settings.
        RanksError: Some ranks did not come.
    """
    if config.ranks != "merge" or place.world == 1:
        return None
    if config.budget:
        raise ConfigError(
            f'budget is {config.budget} and ranks "merge": each rank would stretch its interval by itself, and their '
            'steps would part; allowed is one of the two, or ranks="first"'
        )
    return RankGroup.form(_terms_of(config))


def _terms_of(config: Config) -> str:
    """What ranks that merge must have alike, in words for the message that tells where they do not."""
    terms = {
        "interval": config.histogram_interval,
        "scalar_interval": config.scalar_interval,
        "kinds": ",".join(config.kinds),
        "include": ",".join(config.include),
        "exclude": ",".join(config.exclude),
    }
    return " ".join(f"{name}={value}" for name, value in terms.items())
