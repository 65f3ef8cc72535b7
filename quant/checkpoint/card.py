"""placeholder"""


def card(report):
    return "card"
