"""Saving and restoring beside other libraries: `python -m bench --help`.

__main__   the command line
cases      one function per row of the tables
training   the training loop in which contenders take turns to save
peers      one class per contender, all with the same verbs
states     what is saved: models with Adam, LoRA, many small tensors
machine    what the machine itself can do
durable    fsync, the page cache, sizes on the disk
apart      work in a process of its own, its memory watched from outside
outcome    the figures of one case, and what was aimed at
report     figures as Markdown;  plots  the same as SVG
"""
