"""What everything else stands on and knows nothing of language models; each module is used by its own name.

Settings come in as flags or files (`json_files`, `toml_files`, `text_files`) and become dataclasses (`settings`); what
is wrong with them is said in one line (`errors`, `wording`). What goes to a disk goes through `storage`, whole or not
at all, by one process at a time (`lock`), and signals wait for it (`interrupts`). `cores` and `allocator` are the
machine, `progress` what a person sees of long work.
"""

__all__: list[str] = []
