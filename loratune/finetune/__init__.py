"""Fine-tuning and validation: everything between instruction data and a validation loss.

`prepare` (with `data`, `records`, `prompts`, `split`, `prepared`, `order`) turns the user's files into
token arrays once per study and never imports torch; the engines train and validate on those arrays.
"""
