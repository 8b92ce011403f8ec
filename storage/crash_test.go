package storage

const crashDir = "BREAKWATER_TEST_CRASH_DIR"

func writeUntilKilled(string) {}
