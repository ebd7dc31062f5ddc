//! Implements the gRPC TrainingService.

use std::pin::Pin;
use std::sync::Arc;

use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

use super::auth::split_caller;
use super::convert::{invalid, job_id, page_size, training as convert};
use super::pb::{self, training_service_server::TrainingService};
use super::status::status;
use crate::service::jobs::JobService;

/// The gRPC service for training jobs.
pub(super) struct TrainingRpc(pub Arc<JobService>);

/// Returns the status for a request without a job.
fn missing_job() -> Status {
    invalid("training_job", "is missing")
}

type EventStream = Pin<Box<dyn Stream<Item = Result<pb::TrainingEvent, Status>> + Send>>;

#[tonic::async_trait]
impl TrainingService for TrainingRpc {
    async fn create_training_job(
        &self,
        request: Request<pb::CreateTrainingJobRequest>,
    ) -> Result<Response<pb::TrainingJob>, Status> {
        let (caller, r) = split_caller(request)?;
        let request = convert::job_request(r.training_job.ok_or_else(missing_job)?)?;
        let request_id = (!r.request_id.is_empty()).then_some(r.request_id);
        let job = self
            .0
            .create_job(&caller, request, request_id, r.validate_only)
            .await
            .map_err(status)?;
        Ok(Response::new(convert::job(job)))
    }

    async fn get_training_job(
        &self,
        request: Request<pb::GetTrainingJobRequest>,
    ) -> Result<Response<pb::TrainingJob>, Status> {
        let (caller, r) = split_caller(request)?;
        let job = self
            .0
            .get_job(&caller, job_id("name", &r.name)?)
            .await
            .map_err(status)?;
        Ok(Response::new(convert::job(job)))
    }

    async fn list_training_jobs(
        &self,
        request: Request<pb::ListTrainingJobsRequest>,
    ) -> Result<Response<pb::ListTrainingJobsResponse>, Status> {
        let (caller, r) = split_caller(request)?;
        let (states, size) = (convert::states(&r.states)?, page_size(r.page_size, 50)?);
        let page = self
            .0
            .list_jobs(&caller, r.own.into(), &states, size, &r.page_token)
            .await
            .map_err(status)?;
        let training_jobs = page.items.into_iter().map(convert::job).collect();
        Ok(Response::new(pb::ListTrainingJobsResponse {
            training_jobs,
            next_page_token: page.next_page_token,
        }))
    }

    async fn estimate_training_job(
        &self,
        request: Request<pb::EstimateTrainingJobRequest>,
    ) -> Result<Response<pb::EstimateTrainingJobResponse>, Status> {
        let (caller, r) = split_caller(request)?;
        let request = convert::job_request(r.training_job.ok_or_else(missing_job)?)?;
        let estimate = self
            .0
            .estimate_job(&caller, request)
            .await
            .map_err(status)?;
        Ok(Response::new(convert::estimate(estimate)))
    }

    async fn update_training_job(
        &self,
        request: Request<pb::UpdateTrainingJobRequest>,
    ) -> Result<Response<pb::TrainingJob>, Status> {
        let (caller, r) = split_caller(request)?;
        let job = r.training_job.unwrap_or_default();
        let (id, etag) = (
            job_id("training_job.name", &job.name)?.to_owned(),
            job.etag.clone(),
        );
        let changes = convert::changes(job, r.update_mask)?;
        let etag = (!etag.is_empty()).then_some(etag.as_str());
        let job = self
            .0
            .update_job(&caller, &id, etag, changes)
            .await
            .map_err(status)?;
        Ok(Response::new(convert::job(job)))
    }

    async fn pause_training_job(
        &self,
        request: Request<pb::PauseTrainingJobRequest>,
    ) -> Result<Response<pb::TrainingJob>, Status> {
        let (caller, r) = split_caller(request)?;
        let job = self
            .0
            .pause_job(&caller, job_id("name", &r.name)?)
            .await
            .map_err(status)?;
        Ok(Response::new(convert::job(job)))
    }

    async fn resume_training_job(
        &self,
        request: Request<pb::ResumeTrainingJobRequest>,
    ) -> Result<Response<pb::TrainingJob>, Status> {
        let (caller, r) = split_caller(request)?;
        let job = self
            .0
            .resume_job(&caller, job_id("name", &r.name)?)
            .await
            .map_err(status)?;
        Ok(Response::new(convert::job(job)))
    }

    async fn cancel_training_job(
        &self,
        request: Request<pb::CancelTrainingJobRequest>,
    ) -> Result<Response<pb::TrainingJob>, Status> {
        let (caller, r) = split_caller(request)?;
        let job = self
            .0
            .cancel_job(&caller, job_id("name", &r.name)?)
            .await
            .map_err(status)?;
        Ok(Response::new(convert::job(job)))
    }

    async fn delete_training_job(
        &self,
        request: Request<pb::DeleteTrainingJobRequest>,
    ) -> Result<Response<pb::DeleteTrainingJobResponse>, Status> {
        let (caller, r) = split_caller(request)?;
        self.0
            .delete_job(&caller, job_id("name", &r.name)?)
            .await
            .map_err(status)?;
        Ok(Response::new(pb::DeleteTrainingJobResponse {}))
    }

    async fn list_training_events(
        &self,
        request: Request<pb::ListTrainingEventsRequest>,
    ) -> Result<Response<pb::ListTrainingEventsResponse>, Status> {
        let (caller, r) = split_caller(request)?;
        let (id, size) = (job_id("parent", &r.parent)?, page_size(r.page_size, 100)?);
        let (events, more) = self
            .0
            .list_events(&caller, id, r.after_sequence, size)
            .await
            .map_err(status)?;
        let events = events.into_iter().map(|e| convert::event(id, e)).collect();
        Ok(Response::new(pb::ListTrainingEventsResponse {
            events,
            more,
        }))
    }

    type StreamTrainingEventsStream = EventStream;

    async fn stream_training_events(
        &self,
        request: Request<pb::StreamTrainingEventsRequest>,
    ) -> Result<Response<EventStream>, Status> {
        let (caller, r) = split_caller(request)?;
        let id = job_id("parent", &r.parent)?.to_owned();
        let events = self
            .0
            .stream_events(&caller, &id, r.after_sequence, r.tail)
            .await
            .map_err(status)?;
        let stream = events.map(move |e| e.map(|e| convert::event(&id, e)).map_err(status));
        Ok(Response::new(Box::pin(stream)))
    }
}
