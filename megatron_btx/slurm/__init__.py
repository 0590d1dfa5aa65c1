"""A run's stages as jobs of Slurm: scripts, what they call while they run, and the queue they stand in.

Slurm is the engine, and the manifests are the state. What a job is called says which stage of which run it is, so the
queue itself is the only list of jobs; a script may be submitted any number of times, by anybody, at once.
"""
