"""The pure core: what a run is, which moves it may make, and what each outcome means for it.

Owns the records of runs and steps, the tables of moves, transitions, definitions, progress, back-off and errors.
It must never read a clock, do I/O, draw a random number, or know that the data is stored in MongoDB.
Every other package may import it. It imports the standard library only.
"""
