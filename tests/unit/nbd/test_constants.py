import nbdqcow.nbd.constants as nbd


def test_magics_are_the_letters_that_the_protocol_names():
    assert nbd.INIT_PASSWD.to_bytes(8) == b"NBDMAGIC"
    assert nbd.IHAVEOPT_MAGIC.to_bytes(8) == b"IHAVEOPT"


def test_no_two_constants_of_a_kind_are_equal():
    kinds = (
        "FLAG_C_",
        "OPT_",
        "REP_",
        "INFO_",
        "CMD_FLAG_",
        "REPLY_TYPE_",
        "STATE_",
    )
    for kind in kinds:
        values = [v for k, v in vars(nbd).items() if k.startswith(kind)]
        assert len(values) == len(set(values)), kind
    handshake = ("FLAG_C_", "FLAG_FIXED", "FLAG_NO_")
    flags = [
        value
        for name, value in vars(nbd).items()
        if name.startswith("FLAG_") and not name.startswith(handshake)
    ]
    assert len(flags) == len(set(flags)) == 13


def test_name_tables_are_complete():
    def values(prefix, *without):
        return {
            v
            for k, v in vars(nbd).items()
            if k.startswith(prefix) and not any(k.startswith(w) for w in without)
        }

    assert set(nbd.OPTION_NAMES) == values("OPT_")
    assert set(nbd.REPLY_NAMES) == values("REP_") - {nbd.REP_FLAG_ERROR}
    assert set(nbd.COMMAND_NAMES) == values("CMD_", "CMD_FLAG_")


def test_names_for_messages():
    assert nbd.option_name(nbd.OPT_GO) == "GO"
    assert nbd.option_name(999) == "option 999"
    assert nbd.reply_name(nbd.REP_ACK) == "ACK"
    assert nbd.reply_name(0x80000099) == "reply 0x80000099"
