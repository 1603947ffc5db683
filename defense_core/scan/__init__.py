"""Backdoor scan: detectors, their calibration on clean reference models, and a verdict of three states."""
