"""Files of labelled data: one file of code for each group of formats, all of which give (place, row) pairs.

A place ("a.csv, line 3") is what an error about the row begins with. What is wrong with one row goes to `Faults`; what
is wrong with a whole file raises ValueError.
"""
