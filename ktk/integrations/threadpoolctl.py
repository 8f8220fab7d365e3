"""ktk in threadpoolctl: `threadpool_info()` lists its pools, and `threadpool_limits()` limits them.

Importing this module registers the controller. The limit holds for all threads and pools of the process, from
each pool's next parallel section on; results do not depend on it.
"""

from __future__ import annotations

import ctypes

import threadpoolctl

__all__ = ["KtkController"]


class KtkController(threadpoolctl.LibController):  # type: ignore[misc]
    """The controller of libktk.so, with `user_api` and `internal_api` "ktk"."""

    user_api = "ktk"
    internal_api = "ktk"
    filename_prefixes = ("libktk",)
    check_symbols = ("ktk_get_num_threads", "ktk_set_num_threads")

    def get_num_threads(self) -> int | None:
        """Most threads of a pool that work at a time; None if the library does not say."""
        number = ctypes.c_int32()
        status = self.dynlib.ktk_get_num_threads(ctypes.byref(number))
        return number.value if status == 0 else None

    def set_num_threads(self, num_threads: int) -> None:
        """Limits each pool to `num_threads` threads, at least 1."""
        self.dynlib.ktk_set_num_threads(ctypes.c_int32(max(1, int(num_threads))))

    def get_version(self) -> str:
        """Version of the library."""
        self.dynlib.ktk_version.restype = ctypes.c_char_p
        return str(self.dynlib.ktk_version().decode())


threadpoolctl.register(KtkController)
