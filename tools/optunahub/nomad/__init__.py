from loratune.samplers import NomadSampler


__all__ = ["NomadSampler"]
