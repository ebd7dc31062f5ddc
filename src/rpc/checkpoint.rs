//! Implements the gRPC CheckpointService.

use std::path::PathBuf;

use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::auth::split_caller;
use super::convert::{identity, invalid, job_id, timestamp};
use super::pb::{
    self, checkpoint_service_server::CheckpointService, download_checkpoint_response::Part,
};
use super::status::status;
use crate::domain::identity::ModelIdentity;
use crate::domain::job::Checkpoint;
use crate::domain::names::{self, CheckpointRef};
use crate::domain::violation::quoted;
use crate::formats::weights::ElementType;
use crate::service::artifacts::{ExportFormat, ExportedFile};
use crate::service::auth::tokens::TokenService;
use crate::service::checkpoints::{self, ExportRequest};
use crate::service::error::ServiceError;

/// Size of a chunk of a download, in bytes.
const CHUNK_BYTES: usize = 256 << 10;
/// Maximum number of messages that wait for a slow client.
const MAX_WAITING_MESSAGES: usize = 4;

/// The gRPC service for checkpoints.
pub(super) struct CheckpointRpc {
    pub checkpoints: checkpoints::CheckpointService,
    /// Ends the downloads of callers whose tokens become invalid.
    pub tokens: TokenService,
}

#[tonic::async_trait]
impl CheckpointService for CheckpointRpc {
    async fn get_checkpoint(
        &self,
        request: Request<pb::GetCheckpointRequest>,
    ) -> Result<Response<pb::Checkpoint>, Status> {
        let (caller, r) = split_caller(request)?;
        let (job, which) = parse_name(&r.name)?;
        let (checkpoint, base) = self
            .checkpoints
            .get_checkpoint(&caller, job, which)
            .await
            .map_err(status)?;
        Ok(Response::new(convert(checkpoint, base)))
    }

    async fn list_checkpoints(
        &self,
        request: Request<pb::ListCheckpointsRequest>,
    ) -> Result<Response<pb::ListCheckpointsResponse>, Status> {
        let (caller, r) = split_caller(request)?;
        let (all, base) = self
            .checkpoints
            .list_checkpoints(&caller, job_id("parent", &r.parent)?)
            .await
            .map_err(status)?;
        let checkpoints = all.into_iter().map(|c| convert(c, base.clone())).collect();
        Ok(Response::new(pb::ListCheckpointsResponse { checkpoints }))
    }

    async fn delete_checkpoint(
        &self,
        request: Request<pb::DeleteCheckpointRequest>,
    ) -> Result<Response<pb::DeleteCheckpointResponse>, Status> {
        let (caller, r) = split_caller(request)?;
        let (job, CheckpointRef::Step(step)) = parse_name(&r.name)? else {
            return Err(invalid(
                "name",
                "must name a step, because latest and best may change before the deletion",
            ));
        };
        self.checkpoints
            .delete_checkpoint(&caller, job, step)
            .await
            .map_err(status)?;
        Ok(Response::new(pb::DeleteCheckpointResponse {}))
    }

    async fn export_checkpoint(
        &self,
        request: Request<pb::ExportCheckpointRequest>,
    ) -> Result<Response<pb::ExportCheckpointResponse>, Status> {
        let (caller, r) = split_caller(request)?;
        let (job, which) = parse_name(&r.name)?;
        let export = self
            .checkpoints
            .export_checkpoint(&caller, job, which, export_request(r.format, &r.dtype)?)
            .await
            .map_err(status)?;
        let files = export.files.into_iter().map(file).collect();
        Ok(Response::new(pb::ExportCheckpointResponse {
            path: export.location,
            files,
        }))
    }

    type DownloadCheckpointStream = ReceiverStream<Result<pb::DownloadCheckpointResponse, Status>>;

    async fn download_checkpoint(
        &self,
        request: Request<pb::DownloadCheckpointRequest>,
    ) -> Result<Response<Self::DownloadCheckpointStream>, Status> {
        let (caller, r) = split_caller(request)?;
        let (job, which) = parse_name(&r.name)?;
        let export = self
            .checkpoints
            .export_checkpoint(&caller, job, which, export_request(r.format, &r.dtype)?)
            .await
            .map_err(status)?;
        let (sender, receiver) = mpsc::channel(MAX_WAITING_MESSAGES);
        let tokens = self.tokens.clone();
        tokio::spawn(async move {
            let sending = async {
                for f in export.files {
                    let path = export.path.join(&f.path);
                    if !send_file(&sender, f, path).await {
                        return;
                    }
                }
            };
            let invalid = tokio::select! {
                () = sending => return,
                e = tokens.until_invalid(&caller) => e,
            };
            let _ = sender.send(Err(status(invalid))).await;
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

type Sender = mpsc::Sender<Result<pb::DownloadCheckpointResponse, Status>>;

/// Sends a file's header and bytes. Returns false if the client has left or the file cannot be
/// read.
async fn send_file(sender: &Sender, f: ExportedFile, path: PathBuf) -> bool {
    let part = |part| Ok(pb::DownloadCheckpointResponse { part: Some(part) });
    if sender.send(part(Part::File(file(f)))).await.is_err() {
        return false;
    }
    let failed =
        |e: std::io::Error| status(ServiceError::internal(format!("{}: {e}", path.display())));
    let mut reader = match tokio::fs::File::open(&path).await {
        Ok(reader) => reader,
        Err(e) => {
            let _ = sender.send(Err(failed(e))).await;
            return false;
        }
    };
    loop {
        let mut buffer = vec![0; CHUNK_BYTES];
        match reader.read(&mut buffer).await {
            Ok(0) => return true,
            Ok(n) => {
                buffer.truncate(n);
                if sender.send(part(Part::Chunk(buffer))).await.is_err() {
                    return false;
                }
            }
            Err(e) => {
                let _ = sender.send(Err(failed(e))).await;
                return false;
            }
        }
    }
}

/// Parses the name of a checkpoint into the job's id and the checkpoint's step, `latest` or `best`.
fn parse_name(name: &str) -> Result<(&str, CheckpointRef), Status> {
    names::parse_checkpoint(name).ok_or_else(|| {
        invalid(
            "name",
            format!(
                "is {}: it must look like trainingJobs/ID/checkpoints/STEP, \
                 where STEP is a number, latest or best",
                quoted(name)
            ),
        )
    })
}

/// Converts the format and the element type that a client requests.
fn export_request(given: i32, dtype: &str) -> Result<ExportRequest, Status> {
    let dtype = match dtype {
        "" => None,
        name => Some(ElementType::parse(name).ok_or_else(|| {
            invalid(
                "dtype",
                format!("is {}: it must be f32, bf16, f16 or empty", quoted(name)),
            )
        })?),
    };
    Ok(ExportRequest {
        format: format(given)?,
        dtype,
    })
}

fn format(given: i32) -> Result<Option<ExportFormat>, Status> {
    match pb::ExportFormat::try_from(given) {
        Ok(pb::ExportFormat::Unspecified) => Ok(None),
        Ok(pb::ExportFormat::Adapter) => Ok(Some(ExportFormat::Adapter)),
        Ok(pb::ExportFormat::Merged) => Ok(Some(ExportFormat::Merged)),
        Err(_) => Err(invalid(
            "format",
            format!("is {given}: it must be ADAPTER (1) or MERGED (2)"),
        )),
    }
}

fn file(f: ExportedFile) -> pb::ExportedFile {
    pb::ExportedFile {
        path: f.path,
        size_bytes: f.size_bytes,
        content_hash: f.content_hash,
    }
}

fn convert(c: Checkpoint, base: Option<ModelIdentity>) -> pb::Checkpoint {
    pb::Checkpoint {
        name: format!("trainingJobs/{}/checkpoints/{}", c.job, c.step),
        step: c.step,
        best: c.best,
        size_bytes: c.size_bytes,
        metrics: c.metrics,
        create_time: Some(timestamp(c.create_time)),
        adapter: c.adapter,
        base: base.map(identity),
        digest: c.digest,
    }
}
