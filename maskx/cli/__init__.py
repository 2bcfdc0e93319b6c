"""The command `maskx`: one module for each verb, imported when it is asked for.

A verb is a module with its name (`-` becomes `_`). Its docstring is the help text,
``add_arguments(parser)`` adds its arguments, and ``run(args)`` does the work and returns the exit
status, None for 0. What is heavy it imports in ``run``, so that a help text waits for nothing.
"""
