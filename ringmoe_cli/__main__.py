"""`python -m ringmoe_cli`."""

from ringmoe_cli.app import main

main()
