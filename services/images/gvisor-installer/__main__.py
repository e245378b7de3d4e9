"""Makes the folder that the image holds a program: `python3 -I /opt/crucible/app install`."""

import sys

from crucible.nodes.main import main

sys.exit(main())
