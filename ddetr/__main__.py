import sys

from ddetr.cli import main

sys.exit(main())
