"""The one exception users see, and which of others mean that memory is short."""

__all__ = ["MaskoptError", "RankLostError", "is_memory_failure"]


class MaskoptError(ValueError):
    """Something the user can put right: one sentence saying what is wrong, where, and what would be right."""


class RankLostError(MaskoptError):
    """Of several processes that work together, another one has ended, or has not answered in time."""


_MEMORY_WORDS = ("DefaultCPUAllocator", "not enough memory", "Storage size calculation")


def is_memory_failure(error: BaseException) -> bool:
    """Whether an exception means that memory is short, so that the same call may succeed on another machine.

    Parameters
    ----------
    error : BaseException
        Of Python or of torch, which is not imported to tell.
    """
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in str(error) for words in _MEMORY_WORDS)
    )
