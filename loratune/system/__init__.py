"""The machine, its files, its hub, and how numbers and names are spelt: no room's subject, every room's need."""
