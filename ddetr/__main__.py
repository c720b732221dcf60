import sys

from ddetr.cli.main import main

sys.exit(main())
