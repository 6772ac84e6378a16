//! The thread that owns the SQLite connection. SQLite has one writer anyway, so one thread does everything, and what
//! has queued up while it wrote goes into its next transaction: one sync to disk for all of it.

use std::sync::mpsc;
use std::thread::JoinHandle;

use rusqlite::{Connection, ErrorCode, TransactionBehavior};
use tokio::sync::oneshot;

use crate::ports::{PortError, PortResult};

/// Most operations in one transaction, so that the first of them does not wait long for its answer.
const GROUP: usize = 256;

/// The error of a port whose file can't be used now.
pub fn unavailable(message: impl ToString) -> PortError {
    PortError::Unavailable { service: "SQLite", message: message.to_string() }
}

/// The error of a port that will go on refusing.
pub fn refused(message: impl ToString) -> PortError {
    PortError::Refused { service: "SQLite", message: message.to_string() }
}

/// What SQLite said, as a port says it: what another process or the disk may stop doing is transient.
pub fn port_error(e: rusqlite::Error) -> PortError {
    use ErrorCode::*;
    match e.sqlite_error_code() {
        Some(
            DatabaseBusy | DatabaseLocked | DiskFull | SystemIoFailure | OutOfMemory | CannotOpen
            | OperationInterrupted,
        ) => unavailable(e),
        _ => refused(e),
    }
}

/// Something to do on the connection, in a transaction that may hold others' operations too.
trait Operation: Send {
    /// Does it; an error undoes this operation alone.
    fn apply(&mut self, db: &Connection) -> Result<(), ()>;
    /// Hands the answer over, once the transaction is on disk or has failed.
    fn answer(self: Box<Self>, committed: &PortResult<()>);
}

struct Call<T, F> {
    work: Option<F>,
    result: Option<rusqlite::Result<T>>,
    reply: oneshot::Sender<PortResult<T>>,
}

impl<T, F> Operation for Call<T, F>
where
    T: Send,
    F: FnOnce(&Connection) -> rusqlite::Result<T> + Send,
{
    fn apply(&mut self, db: &Connection) -> Result<(), ()> {
        let Some(work) = self.work.take() else { return Err(()) };
        let result = work(db);
        let done = if result.is_ok() { Ok(()) } else { Err(()) };
        self.result = Some(result);
        done
    }

    fn answer(self: Box<Self>, committed: &PortResult<()>) {
        let answer = match (self.result, committed) {
            (Some(Err(e)), _) => Err(port_error(e)),
            (_, Err(e)) => Err(e.clone()),
            (Some(Ok(value)), Ok(())) => Ok(value),
            (None, Ok(())) => Err(unavailable("the operation did not run")),
        };
        // Whoever asked may have stopped waiting.
        let _ = self.reply.send(answer);
    }
}

/// The connection, by way of its thread. Dropping it finishes what was asked and closes the file.
pub struct Database {
    operations: Option<mpsc::Sender<Box<dyn Operation>>>,
    thread: Option<JoinHandle<()>>,
}

impl Database {
    /// Starts the thread. `kept` is dropped after the connection.
    pub fn start(connection: Connection, kept: impl Send + 'static) -> PortResult<Self> {
        let (operations, inbox) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("ledger".into())
            .spawn(move || {
                serve(connection, &inbox);
                drop(kept);
            })
            .map_err(unavailable)?;
        Ok(Self { operations: Some(operations), thread: Some(thread) })
    }

    /// Runs `work` on the connection and waits until its changes are on disk. An error undoes them.
    pub async fn run<T, F>(&self, work: F) -> PortResult<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let call = Box::new(Call { work: Some(work), result: None, reply });
        let sent = self.operations.as_ref().is_some_and(|operations| operations.send(call).is_ok());
        if !sent {
            return Err(unavailable("the ledger's thread is gone"));
        }
        answer.await.map_err(|_| unavailable("the ledger's thread is gone"))?
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        // The thread ends with its channel; waiting for it means that the file can be opened again at once.
        self.operations = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(mut connection: Connection, inbox: &mpsc::Receiver<Box<dyn Operation>>) {
    while let Ok(first) = inbox.recv() {
        let mut group: Vec<_> = std::iter::once(first).chain(inbox.try_iter()).take(GROUP).collect();
        let committed = transact(&mut connection, &mut group).map_err(port_error);
        for operation in group {
            operation.answer(&committed);
        }
    }
}

fn transact(connection: &mut Connection, group: &mut [Box<dyn Operation>]) -> rusqlite::Result<()> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    for operation in group {
        transaction.execute_batch("SAVEPOINT operation")?;
        if operation.apply(&transaction).is_err() {
            transaction.execute_batch("ROLLBACK TO operation")?;
        }
        transaction.execute_batch("RELEASE operation")?;
    }
    transaction.commit()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_failed_operation_undoes_itself_and_not_its_neighbours() {
        let db = Database::start(Connection::open_in_memory().unwrap(), ()).unwrap();
        db.run(|db| db.execute_batch("CREATE TABLE t (n INTEGER UNIQUE)")).await.unwrap();
        // While this one sleeps the others queue up, and then share a transaction.
        let slow = db.run(|_| {
            std::thread::sleep(std::time::Duration::from_millis(100));
            Ok(())
        });
        let insert = |n: i64| {
            db.run(move |db| {
                db.execute("INSERT INTO t VALUES (?1)", [n])?;
                db.execute("INSERT INTO t VALUES (?1)", [n % 2 + 100])
            })
        };
        let (_, a, b, c) = tokio::join!(slow, insert(0), insert(1), insert(2));
        assert!(a.is_ok() && b.is_ok());
        assert!(matches!(c, Err(PortError::Refused { .. })), "{c:?}");
        let sum: i64 = db.run(|db| db.query_row("SELECT sum(n) FROM t", [], |row| row.get(0))).await.unwrap();
        assert_eq!(sum, 1 + 100 + 101);
    }
}
