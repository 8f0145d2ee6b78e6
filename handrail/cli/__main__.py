from handrail.cli.commands import main

main()
