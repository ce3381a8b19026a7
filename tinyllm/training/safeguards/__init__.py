"""Which steps are not made, what is done then, and what is kept for an autopsy."""

__all__: list[str] = []
