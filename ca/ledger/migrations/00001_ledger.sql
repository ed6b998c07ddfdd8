-- +goose Up
-- Who was attested. One row per pod and not per certificate, so that what is
-- written at every signature stays small.
CREATE TABLE subjects (
    id        INTEGER PRIMARY KEY,
    spiffe_id TEXT NOT NULL,
    pod_uid   TEXT NOT NULL,
    node      TEXT NOT NULL,
    cluster   TEXT NOT NULL,
    attestor  TEXT NOT NULL,
    UNIQUE (spiffe_id, pod_uid, node, cluster, attestor)
) STRICT;
CREATE INDEX subjects_pod ON subjects (pod_uid);
CREATE INDEX subjects_node ON subjects (node);

CREATE TABLE issuers (
    id     INTEGER PRIMARY KEY,
    key_id BLOB NOT NULL UNIQUE
) STRICT;

-- Times are microseconds (recorded_at) and seconds since 1970, UTC.
CREATE TABLE intents (
    seq         INTEGER PRIMARY KEY,
    serial      BLOB NOT NULL,
    subject     INTEGER NOT NULL REFERENCES subjects (id),
    issuer      INTEGER NOT NULL REFERENCES issuers (id),
    subject_key BLOB NOT NULL,
    tbs_sha256  BLOB NOT NULL,
    recorded_at INTEGER NOT NULL,
    not_before  INTEGER NOT NULL,
    not_after   INTEGER NOT NULL
) STRICT;
CREATE INDEX intents_recorded ON intents (recorded_at);

-- Serial numbers are random, so that an index on them would dirty a page for
-- each signature, more than the row itself costs. These two are filled in bulk,
-- in order, a little later; what has a sequence above indexed.through is found
-- by a scan of that tail.
CREATE TABLE by_serial (
    serial BLOB NOT NULL,
    seq    INTEGER NOT NULL,
    PRIMARY KEY (serial, seq)
) STRICT, WITHOUT ROWID;
CREATE TABLE by_subject (
    subject INTEGER NOT NULL,
    seq     INTEGER NOT NULL,
    PRIMARY KEY (subject, seq)
) STRICT, WITHOUT ROWID;
CREATE TABLE indexed (
    id      INTEGER PRIMARY KEY CHECK (id = 1),
    through INTEGER NOT NULL
) STRICT;
INSERT INTO indexed VALUES (1, 0);

-- What became of an intent; its own table, so that rows are added and never changed.
CREATE TABLE results (
    seq         INTEGER PRIMARY KEY,
    outcome     INTEGER NOT NULL,
    leaf_sha256 BLOB NOT NULL
) STRICT;

-- Written to find out whether a ledger that failed can be written again.
CREATE TABLE probe (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    at INTEGER NOT NULL
) STRICT;

CREATE VIEW ledger AS
SELECT i.seq, i.serial, s.spiffe_id, s.pod_uid, s.node, s.cluster, s.attestor, i.subject_key, u.key_id AS issuer_key,
       i.tbs_sha256, r.leaf_sha256, i.recorded_at, i.not_before, i.not_after, coalesce(r.outcome, 0) AS outcome
FROM intents i
JOIN subjects s ON s.id = i.subject
JOIN issuers u ON u.id = i.issuer
LEFT JOIN results r ON r.seq = i.seq;

-- +goose Down
DROP VIEW ledger;
DROP TABLE probe;
DROP TABLE indexed;
DROP TABLE by_subject;
DROP TABLE by_serial;
DROP TABLE results;
DROP TABLE intents;
DROP TABLE issuers;
DROP TABLE subjects;
