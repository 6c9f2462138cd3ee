"""`watch()` and `Watcher`: where all rooms come together."""

from instrument.watcher.watch import unwatch, watch
from instrument.watcher.watcher import Watcher

__all__ = ["Watcher", "unwatch", "watch"]
