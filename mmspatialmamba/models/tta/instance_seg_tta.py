"""Test-time augmentation of instance segmentation.

This module imports mmdet, and importing the package does not import this module: a config names the class by its full
path, ``mmspatialmamba.models.tta.InstanceSegTTAModel``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmcv.ops import batched_nms
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_flip, bbox_overlaps
from mmdet.structures.mask import mask2bbox
from mmengine.model import BaseTTAModel
from mmengine.structures import InstanceData
from torch import Tensor, nn

FLIPPED_DIMS = {'horizontal': (-1,), 'vertical': (-2,), 'diagonal': (-2, -1)}


class InstanceSegTTAModel(BaseTTAModel):
    """Merge the boxes and the masks that a detector predicts in several views of an image.

    Views may differ in scale and flip. NMS over the boxes of all views chooses the leaders; a box that it removes
    joins the first leader of its label that it overlaps. In each of these groups the best box of every view has a say:
    the merged box is their average and the merged mask their majority, both weighted by score. The merged score is
    the sum of their scores divided by the number of all views: what few views find counts for less.

    One view alone gives what the detector predicts without test-time augmentation, if the detector itself applies NMS
    with the same threshold. Of the views' masks only crops are kept, so memory is that of a test of one view, and the
    crops.

    Args:
        module (dict | nn.Module): The detector. It predicts ``bboxes``, ``scores``, ``labels`` and boolean ``masks``.
        tta_cfg (dict): ``nms`` is what :func:`mmcv.ops.batched_nms` takes as ``nms_cfg``, with its ``iou_threshold``;
            ``max_per_img`` is how many instances of an image are kept.
        data_preprocessor (dict, optional): Data preprocessor, if the detector's config has none.
            Defaults to None.
    """

    def __init__(self, module: dict | nn.Module, tta_cfg: dict, data_preprocessor: dict | None = None) -> None:
        super().__init__(module, data_preprocessor)
        self.nms = tta_cfg['nms']
        self.iou_threshold = self.nms['iou_threshold']
        self.max_per_img = tta_cfg['max_per_img']

    def test_step(self, data: dict) -> list[DetDataSample]:
        """Predict every view of a batch and merge the predictions.

        Args:
            data (dict): What :class:`mmcv.transforms.TestTimeAug` and ``pseudo_collate`` make: ``inputs`` and
                ``data_samples`` are lists of views, each of them a list of images.

        Returns:
            list[DetDataSample]: The merged prediction of each image: ``pred_instances`` has ``bboxes`` (n, 4) and
            ``scores`` (n,) of float32, ``labels`` (n,) of int64 and boolean ``masks`` (n, height, width), all in the
            size of the original image.

        Raises:
            ValueError: If a view's prediction is not instances with masks, or if it does not say whether the view is
                flipped.
        """
        views = []
        for i in range(len(data['inputs'])):
            view = {key: value[i] for key, value in data.items()}
            flips = [self._take_flip(sample) for sample in view['data_samples']]
            samples = self.module.test_step(view)
            for sample, flip in zip(samples, flips):
                sample.pred_instances = self._to_original(sample, flip)
            views.append(samples)
        return self.merge_preds(list(zip(*views)))

    def merge_preds(self, data_samples_list: Sequence[Sequence[DetDataSample]]) -> list[DetDataSample]:
        """Merge the views of each image.

        Args:
            data_samples_list (Sequence[Sequence[DetDataSample]]): The views of each image, as :meth:`test_step` makes
                them: flips undone and masks cropped.

        Returns:
            list[DetDataSample]: The first view of each image, with the merged ``pred_instances``.
        """
        for views in data_samples_list:
            views[0].pred_instances = self._merge([view.pred_instances for view in views], views[0].ori_shape[:2])
        return [views[0] for views in data_samples_list]

    def _take_flip(self, sample: DetDataSample) -> str | None:
        """Take the flip out of what the detector is told: mmdet's cascades would flip masks that they merge by it."""
        if 'flip' not in sample.metainfo:
            raise ValueError(
                'a view does not say whether it is flipped: give tta_pipeline a RandomFlip (prob=0.0 flips nothing) '
                "and its PackDetInputs the meta_keys 'flip' and 'flip_direction'"
            )
        direction = sample.flip_direction if sample.flip else None
        sample.set_metainfo(dict(flip=False))
        return direction

    def _to_original(self, sample: DetDataSample, flip: str | None) -> InstanceData:
        """Undo the flip of a view's prediction, and replace its masks by a list of crops.

        ``crops`` of the result says where they are: x1, y1, x2, y2 of int64, (n, 4).
        """
        predicted = sorted(key for key, _ in sample.items() if key.startswith('pred_'))
        if predicted != ['pred_instances'] or 'masks' not in sample.pred_instances:
            what = 'boxes without masks' if predicted == ['pred_instances'] else ', '.join(predicted)
            raise ValueError(
                f'InstanceSegTTAModel merges instances with masks, and {type(self.module).__name__} predicts {what}: '
                "for boxes without masks set tta_model.type='DetTTAModel'"
            )
        found = sample.pred_instances
        bboxes, crops = found.bboxes, mask2bbox(found.masks).long()
        masks = [mask[y1:y2, x1:x2].clone() for mask, (x1, y1, x2, y2) in zip(found.masks, crops.tolist())]
        if flip is not None:
            bboxes, crops = (bbox_flip(boxes, sample.ori_shape, flip) for boxes in (bboxes, crops))
            masks = [mask.flip(FLIPPED_DIMS[flip]) for mask in masks]
        return InstanceData(bboxes=bboxes, scores=found.scores, labels=found.labels, masks=masks, crops=crops)

    def _merge(self, views: list[InstanceData], shape: tuple[int, int]) -> InstanceData:
        """Merge the views of one image of the given (height, width)."""
        for i, view in enumerate(views):
            view.source = torch.full_like(view.labels, i)
        found = InstanceData.cat(views)
        found = found[found.scores > 0]
        if len(found) == 0:
            masks = found.bboxes.new_zeros(0, *shape, dtype=torch.bool)
            return InstanceData(bboxes=found.bboxes, scores=found.scores, labels=found.labels, masks=masks)

        leaders = batched_nms(found.bboxes, found.scores, found.labels, self.nms)[1]
        # (leaders, boxes): which box is in which group.
        joins = bbox_overlaps(found.bboxes[leaders], found.bboxes) > self.iou_threshold
        joins &= found.labels[leaders, None] == found.labels
        joins[:, leaders] = torch.eye(len(leaders), dtype=torch.bool, device=joins.device)
        joins &= joins.cumsum(0) == 1

        # (views, groups): the weight of each view's best box, 0 where it has none, and which box that is.
        of_view = found.source == torch.arange(len(views), device=joins.device)[:, None, None]
        weights, members = (found.scores * (joins & of_view)).max(dim=2)
        total = weights.sum(0)
        bboxes = (weights[:, :, None] * found.bboxes[members]).sum(0) / total[:, None]
        scores, order = (total / len(views)).sort(descending=True, stable=True)
        order = order[: self.max_per_img]
        return InstanceData(
            bboxes=bboxes[order],
            scores=scores[: self.max_per_img],
            labels=found.labels[leaders[order]],
            masks=_vote(found.masks, found.crops, members[:, order], weights[:, order], shape),
        )


def _vote(masks: list[Tensor], crops: Tensor, members: Tensor, weights: Tensor, shape: tuple[int, int]) -> Tensor:
    """Let the masks of each group vote, pixel by pixel: half of the group's weight sets a pixel.

    ``members`` and ``weights``, (views, groups), are the indices of each group's masks and their weights. The result is
    boolean, (groups, height, width).
    """
    merged = weights.new_zeros(members.shape[1], *shape, dtype=torch.bool)
    crops = crops.tolist()
    for image, indices, shares in zip(merged, members.t().tolist(), weights.t().tolist()):
        voters = [(masks[i], crops[i], share) for i, share in zip(indices, shares) if share > 0]
        left, top = (min(box[k] for _, box, _ in voters) for k in (0, 1))
        right, bottom = (max(box[k] for _, box, _ in voters) for k in (2, 3))
        votes = weights.new_zeros(bottom - top, right - left)
        for mask, (x1, y1, x2, y2), share in voters:
            votes[y1 - top : y2 - top, x1 - left : x2 - left] += share * mask
        image[top:bottom, left:right] = votes >= sum(shares) / 2
    return merged
