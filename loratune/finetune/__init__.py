"""Fine-tuning and validation: everything between tokenised data and a validation loss.

engines.py   what an engine is; loading one, running segments, probing what a trial costs
hf.py        the reference engine: Transformers' Trainer and PEFT
packed/      the packed engine: many adapters together on one frozen base
methods.py   what is trained (LoRA: lora.py); on which layers: targets.py, layers.py, peft_layers.py
segment.py   one segment's counters, curve, checkpoints and log, the same in every engine
"""
