"""Bad input for everything that reads what comes from outside the process.

An entry makes one case of a `random.Random`: a thing that is right, changed here and there, or one
made up. It says what came of it (``"read"``, ``"refused"`` ...) and raises if that is not what may
come of bad input. The suite runs few cases (``tests/test_fuzz.py``, by hypothesis), ``make fuzz``
many, and atheris, where it is installed, as many as wanted, led by coverage.
"""
