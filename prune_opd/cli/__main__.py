from prune_opd.cli.main import main

main()
