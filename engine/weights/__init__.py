"""Eight-bit weights in files: which modules of a checkpoint have them, in which layout, and how a
full-precision checkpoint is converted into one."""
