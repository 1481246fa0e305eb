"""Faults that really happen, and the check that nothing was lost: the bars R1 to R40.

The test of bar R7 is named test_r07_…; its long form is marked nightly.
"""
