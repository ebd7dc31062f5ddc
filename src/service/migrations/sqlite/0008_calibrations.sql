-- Calibrations of checkpoints. The key stands for everything that a calibration belongs to: the
-- weights of policy and reference, beta, and the normalization of rewards.
CREATE TABLE calibrations (
    job TEXT NOT NULL,
    step INTEGER NOT NULL,
    key TEXT NOT NULL,
    parameters TEXT NOT NULL,
    create_time INTEGER NOT NULL,
    PRIMARY KEY (job, step, key),
    FOREIGN KEY (job, step) REFERENCES checkpoints (job, step) ON DELETE CASCADE
);
INSERT INTO migration_readers (migration, reader, reader_release) VALUES (8, 5, '0.2.0');
