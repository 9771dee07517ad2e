"""Commands: serve, chat, bench, info. The only readers of the command line and the environment."""
