"""Results from evaluated networks: folds are put together."""


def test_folds_are_put_together(net, some, tmp_path):
    split = net[1]
    parts = [replace(split, test=some.take(rows)) for rows in (slice(0, 40), slice(40, 90))]
    trained = {"accuracy": 1.0, "val": 1.0, "seconds": 0.0}

    def put(certify):
        found = []
        for part in parts:
            e = evaluate(net[0], part.test, CLOSE, PROTOCOLS[:3])
            found.append(e if certify(part) else replace(e, certified=None))
        judged = [NetworkResult("sce", 0, tmp_path, e, trained, part, {}) for e, part in zip(found, parts, strict=True)]
        return found, collect(judged, tmp_path, "digits", {}, "a test").runs[0]

    found, run = put(lambda part: True)
    proved = torch.cat([e.certified for e in found])
    assert run.certified.value == share(proved)
    assert run.samples.certified == tuple(proved.int().tolist())
    assert list(run.attack_correct) == COLUMNS[:3]
    for name, figure in run.attack_correct.items():
        assert figure.value == share(torch.cat([e.attack_correct[name] for e in found]))
    assert run.attack_correct["pgd50"] == run.pgd50
    assert run.certified.value <= run.robust.value
    _, run = put(lambda part: part is parts[0])  # a fold without a bound: no figure of the whole
    assert run.certified is None
    assert run.samples.certified is None
