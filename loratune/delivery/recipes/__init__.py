"""Recipes of other tools: a study made of one, and the settings a study found written as one.

recipe.py        a recipe as it is read: what is taken, what cannot be carried over
axolotl.py       Axolotl's YAML
llamafactory.py  LLaMA-Factory's YAML
trl.py           the YAML of `trl sft`
reading.py       which tool's it is; the study it makes
shown_rows.py    where model and data lie, of which format the rows are, how they are shown
best_settings.py  what was found, and parts that several tools share
writing.py       the best settings in each tool's form, and as PEFT's configuration
"""
