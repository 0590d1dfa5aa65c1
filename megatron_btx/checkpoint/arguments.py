def check_against_checkpoint(args): pass
