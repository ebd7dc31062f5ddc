//! Implements the gRPC DatasetService.

use tonic::{Request, Response, Status, Streaming};

use super::auth::split_caller;
use super::convert::{dataset as convert, dataset_id, page_size};
use super::pb::{self, dataset_service_server::DatasetService, upload_dataset_request::Part};
use super::status::{incomplete, status};
use crate::service::datasets;
use crate::service::error::ServiceError;

/// Maximum size of a chunk of an upload, in bytes.
const MAX_CHUNK_BYTES: usize = 4 << 20;

/// The gRPC service for datasets.
pub(super) struct DatasetRpc(pub datasets::DatasetService);

#[tonic::async_trait]
impl DatasetService for DatasetRpc {
    async fn upload_dataset(
        &self,
        request: Request<Streaming<pb::UploadDatasetRequest>>,
    ) -> Result<Response<pb::Dataset>, Status> {
        let (caller, mut stream) = split_caller(request)?;
        let Some(Part::Metadata(meta)) = stream.message().await?.and_then(|m| m.part) else {
            return Err(incomplete(
                "must be metadata in the first message of an upload",
            ));
        };
        let mut upload = self
            .0
            .begin_upload(&caller, convert::upload_meta(meta)?)
            .await
            .map_err(status)?;
        while let Some(message) = stream.message().await? {
            match message.part {
                Some(Part::Chunk(bytes)) if bytes.len() <= MAX_CHUNK_BYTES => {
                    upload.write(&bytes).await.map_err(status)?
                }
                Some(Part::Chunk(bytes)) => {
                    let description = format!(
                        "has {} bytes: send chunks of at most {MAX_CHUNK_BYTES}",
                        bytes.len()
                    );
                    return Err(status(ServiceError::invalid("chunk", description)));
                }
                _ => {
                    return Err(incomplete(
                        "must be a chunk in every message of an upload after the metadata",
                    ));
                }
            }
        }
        let dataset = upload.finish().await.map_err(status)?;
        Ok(Response::new(convert::dataset(dataset, true)))
    }

    async fn get_dataset(
        &self,
        request: Request<pb::GetDatasetRequest>,
    ) -> Result<Response<pb::Dataset>, Status> {
        let (caller, r) = split_caller(request)?;
        let dataset = self
            .0
            .get_dataset(&caller, dataset_id("name", &r.name)?)
            .await
            .map_err(status)?;
        Ok(Response::new(convert::dataset(dataset, true)))
    }

    async fn list_datasets(
        &self,
        request: Request<pb::ListDatasetsRequest>,
    ) -> Result<Response<pb::ListDatasetsResponse>, Status> {
        let (caller, r) = split_caller(request)?;
        let hash = convert::filter(&r.content_hash)?;
        let size = page_size(r.page_size, 50)?;
        let page = self
            .0
            .list_datasets(&caller, r.own.into(), hash, size, &r.page_token)
            .await
            .map_err(status)?;
        let datasets = page
            .items
            .into_iter()
            .map(|d| convert::dataset(d, false))
            .collect();
        Ok(Response::new(pb::ListDatasetsResponse {
            datasets,
            next_page_token: page.next_page_token,
        }))
    }

    async fn delete_dataset(
        &self,
        request: Request<pb::DeleteDatasetRequest>,
    ) -> Result<Response<pb::DeleteDatasetResponse>, Status> {
        let (caller, r) = split_caller(request)?;
        self.0
            .delete_dataset(&caller, dataset_id("name", &r.name)?)
            .await
            .map_err(status)?;
        Ok(Response::new(pb::DeleteDatasetResponse {}))
    }
}
