"""`watch()` and `Watcher`: where all rooms come together."""

from instrument.watcher.watch import Watcher, unwatch, watch

__all__ = ["Watcher", "unwatch", "watch"]
