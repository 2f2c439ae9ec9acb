"""The only place that imports hivemind, and of hivemind only what is used here: p2pd's client, the DHT node, a partition in proportion.

hivemind's packages import all that hivemind can do (averagers, experts, optimizers, and for them torch, scipy and pydantic), of which a
bootstrap peer needs nothing. Their submodules are imported without that here: swarm/light_modules.py. Who uses hivemind beside us
finds all of it. tests/contract/test_light_start.py holds the layout that this relies on.
"""

from swarm.light_modules import lighten

lighten("hivemind", alone={"averaging", "dht", "hivemind_cli", "p2p", "proto", "utils"})
lighten("hivemind.averaging", alone={"load_balancing"})
lighten("hivemind.dht", alone={"crypto", "node", "protocol", "routing", "storage", "traverse", "validation"})
lighten(
    "hivemind.utils",
    {
        "MSGPackSerializer": "hivemind.utils.serializer",
        "SerializerBase": "hivemind.utils.serializer",
        "get_dht_time": "hivemind.utils.timed_storage",
        "get_logger": "hivemind.utils.logging",
    },
    alone={"asyncio", "auth", "crypto", "logging", "multiaddr", "serializer", "timed_storage"},
)
