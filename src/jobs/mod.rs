//! The store, the queue, the event feed, datasets and artifacts.
